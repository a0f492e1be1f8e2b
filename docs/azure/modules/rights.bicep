// One role for one identity on one container, maybe with a condition.
param account string
param container string
param principal string
param principalType string = 'ServicePrincipal'
param role string
param condition string = ''

var roles = 'Microsoft.Authorization/roleDefinitions'

resource store 'Microsoft.Storage/storageAccounts@2023-05-01' existing = {
  name: account
}

resource service 'Microsoft.Storage/storageAccounts/blobServices@2023-05-01' existing = {
  parent: store
  name: 'default'
}

resource folder 'Microsoft.Storage/storageAccounts/blobServices/containers@2023-05-01' existing = {
  parent: service
  name: container
}

resource assignment 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  name: guid(folder.id, principal, role)
  scope: folder
  properties: {
    principalId: principal
    principalType: principalType
    roleDefinitionId: subscriptionResourceId(roles, role)
    condition: empty(condition) ? null : condition
    conditionVersion: empty(condition) ? null : '2.0'
  }
}
