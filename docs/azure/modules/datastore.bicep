// A container as the workspace knows it. No credentials: jobs use their own identity.
param workspace string
param name string
param account string
param container string
param storeGroup string

resource home 'Microsoft.MachineLearningServices/workspaces@2024-10-01' existing = {
  name: workspace
}

resource datastore 'Microsoft.MachineLearningServices/workspaces/datastores@2024-10-01' = {
  parent: home
  name: name
  properties: {
    datastoreType: 'AzureBlob'
    accountName: account
    containerName: container
    endpoint: environment().suffixes.storage
    protocol: 'https'
    subscriptionId: subscription().subscriptionId
    resourceGroup: storeGroup
    serviceDataAccessAuthIdentity: 'None'
    credentials: { credentialsType: 'None' }
  }
}
