// A party's storage account, and the identity that its jobs run as. No key opens it.
param name string
param party string
param location string
param containers array
param private bool
param workspacePrincipal string

// Azure AI Enterprise Network Connection Approver
var approver = 'b556d68e-0be0-4f35-a333-ad7ee1ce17ea'
var roles = 'Microsoft.Authorization/roleDefinitions'

resource account 'Microsoft.Storage/storageAccounts@2023-05-01' = {
  name: name
  location: location
  kind: 'StorageV2'
  sku: { name: 'Standard_LRS' }
  properties: {
    allowSharedKeyAccess: false
    allowBlobPublicAccess: false
    allowCrossTenantReplication: false
    minimumTlsVersion: 'TLS1_2'
    supportsHttpsTrafficOnly: true
    publicNetworkAccess: private ? 'Disabled' : 'Enabled'
    networkAcls: {
      bypass: 'None'
      defaultAction: private ? 'Deny' : 'Allow'
    }
  }
}

resource service 'Microsoft.Storage/storageAccounts/blobServices@2023-05-01' = {
  parent: account
  name: 'default'
}

resource folders 'Microsoft.Storage/storageAccounts/blobServices/containers@2023-05-01' = [
  for container in containers: {
    parent: service
    name: container
    properties: { publicAccess: 'None' }
  }
]

resource identity 'Microsoft.ManagedIdentity/userAssignedIdentities@2023-01-31' = {
  name: 'jobs-${party}'
  location: location
}

// For the private endpoint from the workspace's managed network.
resource approves 'Microsoft.Authorization/roleAssignments@2022-04-01' = if (private) {
  name: guid(account.id, workspacePrincipal, approver)
  scope: account
  properties: {
    principalId: workspacePrincipal
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId(roles, approver)
  }
}

output id string = account.id
output name string = account.name
output identity string = identity.id
output principal string = identity.properties.principalId
